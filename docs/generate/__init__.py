"""Makes the pages of docs/reference/ from the code, and the notebooks of docs/tutorials/ from their pages."""
