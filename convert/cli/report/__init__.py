"""What the commands show: a screen for people and one JSON document for programs, in one module for each command."""
