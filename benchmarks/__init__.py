"""What Graft costs and keeps, measured side by side with what it is compared to, in one run."""
