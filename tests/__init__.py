"""Tests mirror edgepose/ path for path; fakes and builders that several areas share are modules beside this file."""
