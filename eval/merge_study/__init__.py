"""What the light form of a policy keeps of direct access to the future."""
