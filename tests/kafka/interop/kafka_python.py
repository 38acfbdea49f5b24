"""Writes and reads records with kafka-python: `kafka_python.py SERVERS write TOPIC` takes JSON lines, and
`kafka_python.py SERVERS read TOPIC COUNT` prints them."""

import json
import sys

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

PATIENCE_MS = 30_000


def encoded(text):
    return None if text is None else text.encode()


def write(servers, topic):
    producer = KafkaProducer(bootstrap_servers=servers, compression_type="gzip")
    sent = []
    for record in map(json.loads, sys.stdin):
        headers = [(name, encoded(value)) for name, value in record["headers"]]
        sent.append(producer.send(topic, key=encoded(record["key"]), value=encoded(record["value"]), headers=headers,
                                  timestamp_ms=record["timestamp"]))
    for result in sent:
        result.get(timeout=PATIENCE_MS / 1000)
    producer.close()


def read(servers, topic, count):
    consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False,
                             isolation_level="read_committed", consumer_timeout_ms=PATIENCE_MS)
    consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)])
    for _, record in zip(range(int(count)), consumer):
        headers = [[name, None if value is None else value.decode()] for name, value in record.headers]
        print(json.dumps({"partition": record.partition, "offset": record.offset, "timestamp": record.timestamp,
                          "key": record.key.decode(), "value": record.value.decode(), "headers": headers}))
    consumer.close()


if __name__ == "__main__":
    servers, what, *arguments = sys.argv[1:]
    {"write": write, "read": read}[what](servers, *arguments)
