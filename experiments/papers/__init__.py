"""Published methods, each with its claim at small scale, one file each."""

from experiments.papers import quest, seer_attention, spark_digits, volumes, wafers

STUDIES = {module.STUDY.name: module.STUDY for module in (quest, seer_attention, spark_digits, wafers, volumes)}
