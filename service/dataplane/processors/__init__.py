"""Our processors, a module each. A worker imports those alone that its chains name."""
