"""From the words of a prompt to positions in its conditioning."""
