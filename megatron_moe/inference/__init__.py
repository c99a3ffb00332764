"""What a trained model says: generation, and evaluation on text and tasks."""
