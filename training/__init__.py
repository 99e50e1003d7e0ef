"""What a long run needs: its folder, its state for --resume, its processes."""
