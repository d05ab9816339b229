"""Training of certified models: losses that ask for margins, and what connects them to the Hugging Face Trainer."""
