"""`errata serve`: one model over HTTP under any stack of patches, and the ledger's edits made and taken back beside the answering.

`api_errors` what is said no to; `options` limits and addresses; `served_models` names to stacks; `texts` makes ids of text; `rows`,
`plans`, `decode_batch` and `engine` make answers; `jobs` and `edit_worker` make edits; `analysis_worker` asks the model other things;
`service` holds these together; `connections`, `bodies`, `schemas`, `openai_responses`, `routes_*`, `middleware`, `metrics` and `app` are
HTTP; `server` starts and stops.  Only `errata.serve.app`, `errata.serve.server` and what these import need the extra ``serve``.
"""
