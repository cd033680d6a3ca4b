"""Answers from cached contexts, and their scores."""
