"""What is trained beside the LoRA of lora.py: a whole UNet, and a LoRA of the text encoder."""
