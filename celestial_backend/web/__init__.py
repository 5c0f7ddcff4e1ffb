"""
The web server: what Label Studio asks, and what it is answered.

`server` is gunicorn, `connections` its threads, `app` the routes with our checks before them and our errors after
them, `backend` the seam to label-studio-ml, `protocol` the words of both sides, `admission` the limit of how much
is taken on at once, `home` and `openapi` the pages for people, made by `pages`. In go requests, out come answers; the
work itself lies in the predictor and in jobs.
"""
