"""What leaves this machine: fused models, their cards, and the Hub."""
