#!/usr/bin/env bash
# The browser of tests/test_report_page.py, on Debian or Ubuntu and as root: 100 MB, half a minute.
set -euo pipefail
if type chromium >/dev/null 2>&1; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core
