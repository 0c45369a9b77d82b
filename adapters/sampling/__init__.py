"""Prompts, rewards, advantages, generation, and batches supplied from files."""
