"""The intervals of `lowkey.core.intervals`, which reports and measurements share."""

from lowkey.core.intervals import half_width as half_width
from lowkey.core.intervals import paired_bootstrap as paired_bootstrap
from lowkey.core.intervals import t95 as t95
