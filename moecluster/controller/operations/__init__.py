"""What users order and how it is carried out: scaling, draining, placing, new weights."""
