"""What one layer stores. Every cache layer says what it holds (`nbytes`) and what it should hold (`predicted_nbytes`)."""
