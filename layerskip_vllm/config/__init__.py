"""What the user asks for, read and checked in the API server's process."""
