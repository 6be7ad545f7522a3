"""Looking at what the model will see: one row in the terminal, masks as pictures."""
