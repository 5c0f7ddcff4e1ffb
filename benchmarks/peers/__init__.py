"""What the backend is compared with: programs of their own that share nothing with it but the model."""
