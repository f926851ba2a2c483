"""What Doorward is measured against."""
