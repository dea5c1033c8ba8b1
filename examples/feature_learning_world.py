"""Why can a warm start generalise worse than a fresh one? Count it in a world where learning is a choice of features (Shin et al. 2024).

Run it with `python examples/feature_learning_world.py`; it takes a few seconds on one core and writes feature_world.csv to the current folder.
"""

import pandas as pd

from plasticity_probe.training.feature_world import STARTS, FeatureWorld, published, rows, simulate, summary

courses = [simulate(FeatureWorld(), start, seed) for seed in range(3) for start in STARTS]
pd.DataFrame(rows(courses)).to_csv("feature_world.csv", index=False)

# Beside the simulation stand the numbers recomputed from the authors' notebook; NaN where there are none.
entries = pd.concat({"here": pd.DataFrame(summary(courses)), "notebook": pd.DataFrame(published())}, names=["by"])
entries["experiment"] = [f"{at:.0f}" if at > 0 else "average" for at in entries["experiment"]]
print(entries.pivot_table("mean", ["quantity", "experiment"], ["start", "by"], sort=False).round(3).to_string())

warm, ideal = (next(course for course in courses if course.start == start) for start in ("warm", "ideal"))
print(
    f"\nThe warm learner memorised {warm.memorised[-1]} data and knows {warm.learned[-1]} features. The one that forgets what it memorised "
    f"knows {ideal.learned[-1]}: data that are memorised have no gradient any more, and so no longer show their features."
)
