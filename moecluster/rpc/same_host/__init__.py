"""The short way between processes of one host: shared memory and mailboxes."""
