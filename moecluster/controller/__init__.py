"""The controller: decides where experts stand, and brings the cluster there; without Ray."""
