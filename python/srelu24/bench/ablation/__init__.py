"""What each part of the training method is worth: small byte-level transformers trained with parts left out."""
