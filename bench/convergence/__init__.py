"""The paper's comparison: training loss against updates and seconds (Martens & Grosse 2015, sec. 13)."""
