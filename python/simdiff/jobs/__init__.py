"""What a command does from beginning to end; the one room that sees all others."""
