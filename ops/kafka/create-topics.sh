#!/usr/bin/env bash
# Creates the topics of the default configuration, if they are not there: once inside the Kafka image, and for
# `make kafka`, which names its own tool in KAFKA_TOPICS.
set -euo pipefail

server="${1:-kafka:19092}"
partitions="${PARTITIONS:-6}"
read -ra topics <<<"${KAFKA_TOPICS:-/opt/kafka/bin/kafka-topics.sh}"

create() {
  # The broker's limit has to take what kafka.max_message_size (12MiB) allows.
  "${topics[@]}" --bootstrap-server "$server" --create --if-not-exists --topic "$1" \
    --partitions "$partitions" --replication-factor 1 --config max.message.bytes=12582912 "${@:2}"
}

create blipstream.requests
create blipstream.captions
create blipstream.retry.10s
create blipstream.retry.1m
create blipstream.retry.10m
# People look at dead letters when they find the time.
create blipstream.dlq --config retention.ms=2592000000
