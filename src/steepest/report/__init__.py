"""Records to tables and plots; imports nothing heavy by itself."""
