"""What scores pictures one by one: one file a measure."""
