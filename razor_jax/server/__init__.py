"""An HTTP server for many users at once: requests share the slots and pages of one cache."""
