"""`fastmoe check-layout`: whether a model trains on many processes as it does on one."""

from fastmoe.check.check import check_layout
from fastmoe.check.demo import demo
from fastmoe.check.report import Difference, Report

__all__ = ["Difference", "Report", "check_layout", "demo"]
