"""ICE, IKE and retrieval: facts as text in front of the prompt."""
