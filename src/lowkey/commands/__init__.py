"""The sub-commands of `lowkey`, by what they are for."""
