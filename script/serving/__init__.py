"""The server as a process of the caller's: started, supervised, asked."""
