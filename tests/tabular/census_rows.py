"""Made-up rows in the format of Census-Income, which a model can learn from."""

import random

from fastmoe.tabular.census import AMOUNTS, COLUMNS, COUNTS


def rows(number, seed=0):
    made = random.Random(seed)
    return [row(made) for _ in range(number)]


def row(made):
    values = dict.fromkeys(COLUMNS, "Not in universe")
    age, married = made.randrange(90), made.random() < 0.5
    rich = made.random() < (0.4 if age > 40 else 0.1)
    values |= {name: str(made.choice([0, 0, 100])) for name in AMOUNTS}
    values |= {name: str(made.randrange(6)) for name in COUNTS}
    values |= {
        "age": str(age),
        "class_of_worker": made.choice(["Private", "Federal government"]),
        "industry": made.choice(["Retail trade", "Mining"]),
        "education": "Doctorate degree(PhD EdD)" if rich else "Children",
        "marital_status": "Widowed" if married else "Never married",
        "household_summary": made.choice(["Householder", "Spouse of householder"]) if married else "Child 18 or older",
        "migration_msa": "?",
        "instance_weight": "1700.09",
        "year": made.choice(["94", "95"]),
        "income": "50000+." if rich else "- 50000.",
    }
    return ", ".join(values[name] for name in COLUMNS)


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path
