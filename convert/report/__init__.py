"""What the commands show: pages for people, one JSON document for programs; one module for each command."""
