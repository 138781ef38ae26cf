"""The texts and questions that an evaluation is made on."""
