"""The demo here (`aligngpt demo`) and as a Space (`aligngpt space`)."""
