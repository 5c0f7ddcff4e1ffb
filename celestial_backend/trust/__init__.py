"""
How far pre-labels can be trusted: what is shown to people, and what is measured of what they then do.

In go the predictor's answers, and what people made of them in Label Studio; out come the answers that may be shown,
the order in which tasks are labelled, reports, labels to look at again, and certificates. What is held back lies in
the database and nowhere that Label Studio shows. Nothing here learns a model, and nothing knows of requests.
"""
