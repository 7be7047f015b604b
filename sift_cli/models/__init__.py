"""What is done to a Hugging Face model: loading, names, fingerprints, devices."""
