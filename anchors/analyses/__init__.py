"""The studies of prompts: settings, what a seed's prompts share, and what is measured on each. No torch is loaded to list them."""
