"""What runs rest on, measured, planned and compared, and what they came to."""
