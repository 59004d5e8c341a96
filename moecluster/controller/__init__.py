"""The controller: decides which actors hold which experts, and applies it to the cluster. Imports no Ray."""
