"""`qpert serve`: a bundle, and a gallery where one is given, behind HTTP.

`settings` is what the user chooses; `service` does the work that requests ask for, through `batching`; `app` and
`routes` are HTTP; `gate` is what every request has to pass first; `server` starts and stops it all. FastAPI, uvicorn
and prometheus-client come with the extra `serve`, and nothing else in the runtime imports this package.
"""
