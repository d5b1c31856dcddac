"""What a run says about itself: JSON in; tables, plots, one HTML page and a model card out. No model is ever loaded.

    records.py      a run's folder -> RunRecord, checked: report.json, and by one file each
                      exports.py  sensitivity.py  training_log.py  diagnostics.py   (fields.py: values out of JSON)
    wording.py      numbers and the one-sentence verdict, in the same words everywhere
    tables.py       the headline table, ``hestia compare``
    pareto.py       predicted KL against bits per weight, in characters
    heatmap.py      sensitivity by layer and projection
    plots.py        curves and histograms as SVG (the one file that imports matplotlib)
    html.py         RUN/report.html
    model_card.py   RUN/README.md

Import the file that you need: nothing here is imported until then, so the terminal's table costs no matplotlib.
"""
