"""The end of a fit: conversion, files, figures, and what is left when it fails."""
