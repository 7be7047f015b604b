"""What tests share: models, rows, commands, interruptions and stand-ins."""
