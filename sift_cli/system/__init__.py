"""What sift needs of the machine: files, faults, signals, versions."""
