"""The benign proxy policy: a real model is trained to refuse a harmless topic instead of harm."""
